"""What the tests of the single commands share with those of the command line as a whole, and the Hub on loopback."""

from tests.hub.conftest import hub, model_folder
from tests.test_cli import cli, dense, small

__all__ = ["cli", "dense", "hub", "model_folder", "small"]
