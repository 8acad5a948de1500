"""Whose a job is, and who is told of its end."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(sa.Column("client", sa.Text, nullable=False, server_default=""))
        jobs.add_column(sa.Column("webhook_url", sa.Text))
        jobs.add_column(sa.Column("webhook_at", sa.Double, nullable=False, server_default="0"))
        jobs.add_column(sa.Column("webhook_attempts", sa.Integer, nullable=False, server_default="0"))
    op.create_index("jobs_of_client", "jobs", ["client", "seq"])
    told = sa.text("webhook_url IS NOT NULL")
    op.create_index("jobs_to_tell", "jobs", ["webhook_at"], sqlite_where=told, postgresql_where=told)


def downgrade() -> None:
    op.drop_index("jobs_to_tell", "jobs")
    op.drop_index("jobs_of_client", "jobs")
    with op.batch_alter_table("jobs") as jobs:
        for column in ("client", "webhook_url", "webhook_at", "webhook_attempts"):
            jobs.drop_column(column)
