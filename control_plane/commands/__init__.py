"""Commands that ask a running installation over its REST API."""
