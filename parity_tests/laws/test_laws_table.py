"""The page in the documents is that of the tests."""

from parity_tests.laws import laws_table


def test_the_page_is_up_to_date():
    written = laws_table.PAGE.read_text()
    assert written == laws_table.page(), "run python -m parity_tests.laws.laws_table"
