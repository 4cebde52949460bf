"""What an answer to a ticket earns. Called once for each answer, in a process of its own."""

TOPICS = ("billing", "delivery", "returns", "account")


def score(question: str, answer: str, completion: str, row: dict) -> float:
    """1 for the right topic as the only word, half of that inside a sentence, nothing for two topics."""
    said = completion.lower()
    if [topic for topic in TOPICS if topic in said] != [answer]:
        return 0.0
    return 1.0 if said.strip(" .\n") == answer else 0.5
