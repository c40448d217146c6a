"""All planted bugs of the project's tests."""

from parity_tests.mutants.planted_blind import SECOND, THIRD
from parity_tests.mutants.planted_blind_fourth import FOURTH
from parity_tests.mutants.planted_choices import CHOICES_ALL
from parity_tests.mutants.planted_commands import COMMANDS_ALL
from parity_tests.mutants.planted_numbers import NUMBERS_ALL
from parity_tests.mutants.planted_training import TRAINING_ALL

PLANTED = (*COMMANDS_ALL, *TRAINING_ALL, *NUMBERS_ALL, *CHOICES_ALL, *SECOND, *THIRD, *FOURTH)
