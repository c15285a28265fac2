"""The lessons of the trained adapters, and where the adapters are stored."""

from pathlib import Path

from tests.assets.training.french_lesson import FRENCH
from tests.assets.training.json_lesson import JSON
from tests.assets.training.pirate_lesson import PIRATE
from tests.assets.training.ticket_lesson import TICKET

LESSONS = (JSON, FRENCH, TICKET, PIRATE)
TRAINED = Path(__file__).parents[1] / "trained"  # holds a folder for each adapter, and nothing else
