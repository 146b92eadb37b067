"""What the fast paths cost, against what they replace, measured side by side in one run.

A bench returns a `sidetune.bench.rows.Bench`: rows and the machine they were measured on. The command
line prints it as a table, or as one JSON object.
"""

from pathlib import Path

LOOKS = Path("results/looks.jsonl")  # of the working folder: a line each time that test scores are shown
