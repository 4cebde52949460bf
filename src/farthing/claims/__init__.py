"""Claims of others about their costs, and whether these can be true."""
