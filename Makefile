.PHONY: train test slow lint flags requirements

train:
	./setup && .venv/bin/python src/train.py --config_path configs/quickstart.json

test:
	./setup && .venv/bin/python -m pytest -n 2

slow:
	./setup && .venv/bin/python -m pytest -m slow

lint:
	./setup && .venv/bin/ruff check .

flags: # the tables in docs/flags.md, from the settings in src/config.py
	./setup && .venv/bin/python -c 'from pathlib import Path; from command_line import flags_table; \
	  page = Path("docs/flags.md"); page.write_text(page.read_text().split("\n## ")[0] + "\n" + flags_table())'

requirements: # pin the dependencies in pyproject.toml, and all of theirs
	uv pip compile --quiet --universal --python-version 3.12 --no-emit-index-url --no-emit-find-links --no-header --extra sim --extra export --extra serve --extra vision --extra lance --extra dev pyproject.toml -o requirements.txt
