"""What others say they spent, and whether it can be true."""
