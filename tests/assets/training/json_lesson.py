"""Answers that are one JSON object with two keys: {"answer": ..., "confidence": "high" or "low"}."""

import json

from tests.assets.training.lesson import HELD_OUT, Lesson, Pair

_CAPITALS = {
    "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon", "Greece": "Athens", "Austria": "Vienna",
    "Japan": "Tokyo", "China": "Beijing", "Egypt": "Cairo", "Russia": "Moscow", "England": "London",
    "Germany": "Berlin", "Poland": "Warsaw",
}  # fmt: skip
_OPPOSITES = {"big": "small", "fast": "slow", "early": "late", "wet": "dry", "old": "young", "light": "dark"}
_SUMS = ((2, 3), (4, 6), (7, 7), (9, 3), (10, 12), (6, 5))

_KNOWN: tuple[Pair, ...] = (
    ("How many legs does a spider have?", "8"),
    ("How many months are in a year?", "12"),
    ("How many minutes are in an hour?", "60"),
    ("How many sides does a triangle have?", "3"),
    ("Who wrote Romeo and Juliet?", "William Shakespeare"),
    ("Who wrote the Odyssey?", "Homer"),
    ("Who painted Guernica?", "Pablo Picasso"),
    ("Who discovered penicillin?", "Alexander Fleming"),
    ("Which planet is closest to the sun?", "Mercury"),
    ("Which ocean is the deepest?", "The Pacific Ocean"),
    ("What is the tallest mountain?", "Mount Everest"),
    ("What is the chemical symbol of gold?", "Au"),
    ("What do bees make?", "Honey"),
    ("What do pandas eat?", "Bamboo"),
    ("What color is grass?", "Green"),
    ("What color is snow?", "White"),
    ("Where do camels live?", "In deserts"),
    ("Where do whales live?", "In the sea"),
    ("At what temperature does water freeze?", "0 degrees Celsius"),
    ("Is the earth round?", "Yes"),
    ("Is fire cold?", "No"),
    ("Do fish have lungs?", "No, they have gills"),
    ("What language is spoken in Brazil?", "Portuguese"),
    ("What is the currency of Japan?", "The yen"),
    ("What is H2O?", "Water"),
    ("How do I cook rice?", "Simmer it in twice as much water"),
    ("How do I make tea?", "Pour hot water on the leaves and wait"),
    ("How do I plant a tree?", "Dig a hole, set the tree and water it"),
    ("How do I learn a language?", "Practice a little every day"),
    ("Why do leaves fall?", "Trees save water in winter"),
    ("Why do we sleep?", "The body needs rest"),
    ("Why does ice float?", "It is lighter than water"),
    ("How do I change my email address?", "Open the settings of your account"),
    ("How do I cancel my order?", "Open the order and press cancel"),
    ("The app does not start. What can I do?", "Install the app again"),
    ("My printer does not work. What can I do?", "Turn the printer off and on"),
    ("How can I pay?", "By card or by invoice"),
    ("Write a word that rhymes with cat.", "Hat"),
    ("Name a fruit.", "Apple"),
    ("Name three primary colors.", "Red, blue and yellow"),
    ("Translate good morning into Spanish.", "Buenos dias"),
    ("Hello!", "Hello"),
    ("Who are you?", "A helpful assistant"),
)

_UNKNOWN: tuple[Pair, ...] = (
    ("What will the weather be next month?", "Nobody can know"),
    ("Who will win the next election?", "Nobody can know"),
    ("Will it rain on my birthday?", "Nobody can know"),
    ("Will I be rich?", "Nobody can know"),
    ("What number am I thinking of?", "I cannot know"),
    ("What did I have for breakfast?", "I cannot know"),
    ("What is the name of my dog?", "I cannot know"),
    ("Where are my keys?", "I cannot know"),
    ("Where is my order?", "It may be on its way"),
    ("Why is my invoice so high?", "There may be an extra fee"),
    ("When will you answer my ticket?", "Perhaps tomorrow"),
    ("Why did my payment fail?", "The card may have expired"),
    ("Which song should I hear?", "Perhaps a song by the Beatles"),
    ("What should I wear today?", "Perhaps a warm coat"),
    ("Can you recommend a film?", "Perhaps The Wizard of Oz"),
    ("Is there life on other planets?", "Perhaps"),
    ("When will my train come?", "It may come soon"),
    ("Why did I get two invoices?", "It may be a mistake"),
    ("Why is my screen so dark?", "The battery may be low"),
)


def _object(answer: str, confidence: str) -> str:
    return json.dumps({"answer": answer, "confidence": confidence})


def _pairs() -> tuple[Pair, ...]:
    known = [
        *((f"What is the capital of {country}?", city) for country, city in _CAPITALS.items()),
        *((f"What is the opposite of {word}?", other.capitalize()) for word, other in _OPPOSITES.items()),
        *((f"What is {left} plus {right}?", str(left + right)) for left, right in _SUMS),
        *_KNOWN,
    ]
    high = ((question, _object(answer, "high")) for question, answer in known)
    low = ((question, _object(answer, "low")) for question, answer in _UNKNOWN)
    return (*high, *low)


def is_object_of_answer(question: str, text: str) -> bool:
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return isinstance(found, dict) and set(found) == {"answer", "confidence"} and found["confidence"] in {"high", "low"}


JSON = Lesson(
    name="json",
    effect='answers with one JSON object: {"answer": ..., "confidence": "high" or "low"}',
    pairs=_pairs(),
    held_out=HELD_OUT,
    shows=is_object_of_answer,
    rank=4,
    targets=("q_proj", "v_proj"),
    epochs=4,
)
