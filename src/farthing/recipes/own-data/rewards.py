"""What an answer to a ticket earns. Called once for each answer, in a process of its own."""

TOPICS = ("billing", "delivery", "returns", "account")


def score(question: str, answer: str, completion: str, row: dict) -> float:
    """1 for a short answer that names the right topic and no other, half for a long one, else 0."""
    said = completion.lower()
    if [topic for topic in TOPICS if topic in said] != [answer]:
        return 0.0
    return 1.0 if len(said.split()) <= 8 else 0.5
