"""What every floor above stands on: the machine, and what it is asked to do."""
