"""A table, a tiny model and the arguments with which the tests of options run ``finetune``."""

from __future__ import annotations

from parity_tests.models import tiny

# All rows are one batch, so that two epochs are two steps: the first at rate 0, the second at the
# peak. Both see the gradients of the start, so Adam moves every value by the rate, either way.
RATE, DECAY = 0.03, 0.5
BASE = {
    "epochs": 2,
    "batch_size": 40,
    "learning_rate": RATE,
    "weight_decay": DECAY,
    "max_length": 12,
    "r": 2,
    "lora_alpha": 6,
}
# Too small to move a value of float32 that is not 0, so that no epoch is better than the first.
PATIENT = {"epochs": 9, "batch_size": 8, "patience": 2, "learning_rate": 1e-30}
# All that finetune multiplies with is another.
OTHER = {"r": 3, "lora_alpha": 60, "learning_rate": 2 * RATE, "weight_decay": 0.0}
PREFIX = "base_model.model."


class Prepared(BaseException):
    """The texts are chosen, and nothing has to be trained."""


def rows():
    """Forty texts, of two classes of different size, and two that come again with other labels."""
    found = tiny.texts(52, seed=3)
    spam = [row for row in found if row[1] == "spam"]
    ham = [row for row in found if row[1] == "ham"][:14]
    return [*spam, *ham, (spam[0][0], "ham"), (ham[0][0], "spam")]


def write(path, columns, given):
    lines = [",".join(columns)] + [f"{n},{text},{label}" for n, (text, label) in enumerate(given)]
    path.write_text("\n".join(lines) + "\n")
    return path


def first_labels():
    found = {}
    for text, label in rows():
        found.setdefault(text, label)
    return found


def argv(model, table, out, changes):
    options = {"model": model, "data": table, "output": out} | BASE | changes
    words = ["finetune"]
    for name, value in options.items():
        values = value if isinstance(value, tuple) else (value,)
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return words
