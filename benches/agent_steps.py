"""Twenty steps of an agent that keeps a program up to date: each shows it the file and asks for one change."""

from __future__ import annotations

__all__ = ["steps"]

FILE = """\
import json

LIMIT = 10
PATH = "orders.json"
CURRENCY = "EUR"


def load(path=PATH):
    with open(path) as file:
        return json.load(file)


def total(orders):
    return sum(order["price"] for order in orders)


def largest(orders, count=LIMIT):
    return sorted(orders, key=lambda order: -order["price"])[:count]


def show(orders):
    for order in largest(orders):
        print(order["name"], order["price"], CURRENCY)
    print("total", total(orders), CURRENCY)
"""

# What is asked, the text that changes, and what it becomes.
EDITS = [
    ("raise LIMIT to 20", "LIMIT = 10", "LIMIT = 20"),
    ("read clients.json instead", '"orders.json"', '"clients.json"'),
    ("use dollars", '"EUR"', '"USD"'),
    ("rename total to revenue", "total(", "revenue("),
    ("rename the loop variable order to entry in show", "for order in largest", "for entry in largest"),
    ("lower LIMIT to 5", "LIMIT = 20", "LIMIT = 5"),
    ("rename largest to greatest", "largest(", "greatest("),
    ("print sum instead of total", '"total"', '"sum"'),
    ("open the file as UTF-8", "open(path)", 'open(path, encoding="utf-8")'),
    ("use pounds", '"USD"', '"GBP"'),
    ("sort by quantity in greatest", '-order["price"])', '-order["quantity"])'),
    ("rename load to read", "def load(", "def read("),
    ("read orders.json again", '"clients.json"', '"orders.json"'),
    ("raise LIMIT to 50", "LIMIT = 5\n", "LIMIT = 50\n"),
    ("rename show to report", "def show(", "def report("),
    ("print the quantity instead of the price", 'entry["price"]', 'entry["quantity"]'),
    ("rename CURRENCY to UNIT", "CURRENCY", "UNIT"),
    ("use euros", '"GBP"', '"EUR"'),
    ("rename revenue to total", "revenue(", "total("),
    ("lower LIMIT to 25", "LIMIT = 50", "LIMIT = 25"),
]


def steps() -> list[str]:
    """The prompts, in order: each shows the file as the steps before left it."""
    file, prompts = FILE, []
    for asked, old, new in EDITS:
        prompts.append(f"Here is a program.\n\n```python\n{file}```\n\nChange it: {asked}. Print the whole program.")
        file = file.replace(old, new)
    return prompts
