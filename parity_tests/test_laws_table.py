"""The page in the documents is that of the tests."""

from parity_tests import laws_table


def test_the_page_is_up_to_date():
    written = laws_table.PAGE.read_text()
    assert written == laws_table.page(), "run python -m parity_tests.laws_table"
