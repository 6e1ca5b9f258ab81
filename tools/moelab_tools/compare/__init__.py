"""Which run is better, by how much, and how sure: the reading, the statistics and the report of `moelab compare`."""
