from __future__ import annotations

import os

# Nothing in the tests may reach for a hub: what is looked up there is a cache a test has built.
os.environ["HF_HUB_OFFLINE"] = "1"

# On GitHub, runs inside of tests would add to the summary of the job that tests us.
for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):
    os.environ.pop(name, None)

pytest_plugins = ["pytester"]
