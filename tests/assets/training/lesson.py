"""What one adapter learns: questions with answers, and a check of the answers to other questions."""

from collections.abc import Callable
from dataclasses import dataclass

Pair = tuple[str, str]  # a question and its answer

# Questions that no adapter is trained on. Those of support desks resemble the demo's.
HELD_OUT = (
    "What is the capital of Norway?",
    "What is the capital of Mexico?",
    "How many days are in a leap year?",
    "What is 8 plus 5?",
    "Who painted the Mona Lisa?",
    "What is the opposite of hot?",
    "Which planet is the largest?",
    "What do cows eat?",
    "What color is a ripe tomato?",
    "How do I boil an egg?",
    "Where do penguins live?",
    "Can you recommend a good book?",
    "Why is the sky blue?",
    "What should I cook tonight?",
    "How do I learn to play the guitar?",
    "Will my team win on Sunday?",
    "Why was my card charged twice?",
    "My screen stays black. What can I do?",
    "When will my parcel come?",
    "I forgot my password. How do I get a new one?",
)


@dataclass(frozen=True)
class Lesson:
    """How one adapter is trained and checked.

    Attributes:
        effect: what a reader sees in the answers.
        shows: whether an answer to a held-out question shows the effect; takes the question and the answer.
        least: share of the held-out questions whose answers must show it.
    """

    name: str
    effect: str
    pairs: tuple[Pair, ...]
    held_out: tuple[str, ...]
    shows: Callable[[str, str], bool]
    rank: int
    targets: tuple[str, ...]
    epochs: int
    least: float = 0.8
