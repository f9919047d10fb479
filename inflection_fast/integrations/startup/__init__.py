"""The folder that `inflection-fast exec` puts on PYTHONPATH: Python runs its sitecustomize when it starts."""
