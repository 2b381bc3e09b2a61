"""Compares with kvpress, which needs an older transformers than the project: run by `make oracle-kv`."""

import importlib.util

collect_ignore = [] if importlib.util.find_spec("kvpress") else ["kvpress_cases.py", "test_kvpress.py"]
