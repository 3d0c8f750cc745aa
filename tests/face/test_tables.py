"""Tables in text and HTML."""

from farthing.ledger import seconds, size
from farthing.tables import html_table, text_table


def test_columns_line_up():
    assert text_table([("a", "1"), ("longer", "22")], ("name", "n")) == "name     n\n──────  ──\na        1\nlonger  22"
    assert text_table([]) == ""
    assert text_table([("a", "b")], left=True) == "a  b"


def test_html_is_escaped():
    assert "&lt;script&gt;" in html_table([("<script>", "1")], caption="<b>")
    assert "<script>" not in html_table([("<script>", "1")], ("<script>", ""), "<script>")


def test_units():
    assert [size(n) for n in (0, 999, 1000, 98_362_432, 1.5e9, 2e15)] == [
        "0 B",
        "999 B",
        "1 kB",
        "98.4 MB",
        "1.5 GB",
        "2e+03 TB",
    ]
    assert [seconds(s) for s in (0.0012, 2.5)] == ["1.2 ms", "2.50 s"]
