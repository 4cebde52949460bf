"""Counting and booking: FLOPs, memory, hardware and prices, energy, the ledger, the bill. No torch."""
