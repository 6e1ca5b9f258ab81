"""`moelab surgery`: what is asked, the text that decides and judges, the receipt, and what is printed."""
