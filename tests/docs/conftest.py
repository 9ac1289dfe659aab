"""The pages take a command line, a Hub and models as given: those of the other tests."""

from tests.hub.conftest import hub as hub
from tests.hub.conftest import model_folder as model_folder
from tests.test_cli import cli as cli
from tests.test_cli import dense as dense
