"""What an answer to a ticket earns. Called once for each answer, in a process of its own."""

TOPICS = ("billing", "delivery", "returns", "account")


def score(question: str, answer: str, completion: str, row: dict) -> float:
    """1 for an answer that names the right topic and no other, else 0; anything between would be a part of the mark."""
    said = completion.lower()
    return float([topic for topic in TOPICS if topic in said] == [answer])
