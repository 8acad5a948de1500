"""The history of the tables in avatar_api/jobs.py, for alembic.

A change to the tables is a change there and a new revision here, so that databases in use follow. A revision that has
been released stays as it is.
"""
