"""`moelab data`: text filtered, its copies dropped, and an account of every document."""
