"""The built-in suite: ordinary pytest modules, written with the public fixtures and assertions.

Each test ``test_<id>`` carries out the check ``<id>``.  To make the suite part of your own tests,
import from these modules: ``from pytest_lora.suite.test_merge import *``.
"""
