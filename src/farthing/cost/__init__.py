"""What a run costs: FLOPs, hardware and prices, energy, the ledger, the bill. Nothing here imports torch."""
