"""What Alembic runs: the migrations, over the connection and inside the transaction that it is given."""

from alembic import context

from gateway.schema import metadata

context.configure(
    connection=context.config.attributes["connection"], target_metadata=metadata, transactional_ddl=False
)
context.run_migrations()
