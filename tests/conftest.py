from __future__ import annotations

import os

# Nothing in the tests may reach for a hub: what is looked up there is a cache a test has built.
os.environ["HF_HUB_OFFLINE"] = "1"

pytest_plugins = ["pytester"]
