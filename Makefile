.PHONY: train test slow lint requirements

train:
	./setup && .venv/bin/python src/train.py --config_path configs/quickstart.json

test:
	./setup && .venv/bin/python -m pytest

slow:
	./setup && .venv/bin/python -m pytest -m slow

lint:
	./setup && .venv/bin/ruff check .

requirements: # the direct dependencies in pyproject.toml, pinned with all of theirs
	uv pip compile --quiet --universal --python-version 3.12 --no-emit-index-url --no-emit-find-links --no-header --extra sim --extra export --extra serve --extra dev pyproject.toml -o requirements.txt
