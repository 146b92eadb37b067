import json
import runpy
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "scripts"
ROW = {"case": "forward", "metric": "step_s", "value": 1.5, "unit": "s", "ratio": None, "against": None}
ENVIRONMENT = {"setting": {"frames": 8}, "commit": "c" * 40, "threads": 1, "cores": 2, "cpu": "one"}


def test_lines_of_a_command_are_replaced_and_others_stay(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    into, run = tmp_path / "stream.jsonl", tmp_path / "run.json"

    def write(command, value):
        run.write_text(
            "said before\n" + json.dumps({"rows": [{**ROW, "value": value}], "environment": ENVIRONMENT})
        )
        words = ["bench_results.py", str(run), "--command", command, "--into", str(into)]
        monkeypatch.setattr(sys, "argv", words)
        runpy.run_path(str(SCRIPTS / "bench_results.py"), run_name="__main__")
        return [json.loads(line) for line in into.read_text().splitlines()]

    write("stream --frames 8", 1.0)
    write("stream --frames 2", 2.0)
    found = write("stream --frames 8", 3.0)
    assert [(line["command"], line["value"]) for line in found] == [
        ("sidetune bench stream --frames 2", 2.0),
        ("sidetune bench stream --frames 8", 3.0),
    ]
    for line in found:
        assert (line["method"], line["task"], line["seed"], line["commit"]) == (
            "forward",
            "bench stream",
            0,
            "c" * 40,
        )
        assert len(line["recipe"]) == 64 and line["hardware"] == "1 threads of 2 cores, one"
