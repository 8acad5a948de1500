"""Run by alembic, from `JobStore`, in the transaction that it holds."""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
context.run_migrations()
