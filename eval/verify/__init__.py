"""`d3po-bench verify`: published results against themselves."""
