"""`inflection-fast exec` puts this folder on PYTHONPATH: Python runs its sitecustomize at its start."""
