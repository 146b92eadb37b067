"""One function a shipped run: its docstring has command, time and expected score."""
