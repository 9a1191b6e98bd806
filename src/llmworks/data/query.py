"""Stage `data.query`: stream the rows of a SQL query into documents, from any database that SQLAlchemy supports.

A SQLite file is given as an input; a server by a URL whose secrets are names of environment variables.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydantic import Field

from llmworks.core.artifact import Config, Dataset
from llmworks.core.context import Context
from llmworks.core.documents import DocumentWriter, RejectedFile, RejectedInput
from llmworks.core.errors import DataError, MissingDependency, UserError
from llmworks.core.types import Document
from llmworks.data.card import finish_dataset

if TYPE_CHECKING:
    from sqlalchemy import Engine

FETCH_ROWS = 1000  # rows per fetch


class QueryConfig(Config):
    """Query, database and columns."""

    sql: str = Field(min_length=1, description="SQL query; each row becomes a document, in the query's order")
    url: str = Field(
        "",
        description="SQLAlchemy URL, with ${NAME} for environment variables; empty: the input is a SQLite file",
    )
    text_field: str = Field("text", description="column with the text")
    id_field: str = Field("", description="column with the document id; default: the row number")
    max_document_mb: int = Field(64, gt=0, le=1024, description="longer documents are rejected")
    as_of: str = Field("", description="cache key such as a date: the same query runs again only when it changes")


def query(config: QueryConfig, ctx: Context, database: Dataset | None = None) -> Dataset:
    """Run the query and convert every row: the text column becomes the text, the others metadata.

    Errors: UserError for an invalid query or URL; DataError when no row gives a document; MissingDependency for a
    missing driver.
    """
    engine, name = _create_engine(config, database)
    try:
        with (
            DocumentWriter(ctx.out) as writer,
            RejectedFile(ctx.out) as rejected,
            ctx.progress.bar("query", 0, "rows") as bar,
        ):
            for item in _stream_rows(engine, name, config):
                if isinstance(item, RejectedInput):
                    rejected.add(item)
                else:
                    writer.add(item)
                bar.advance()
    finally:
        engine.dispose()
    if not writer.documents:
        first = f"; first row: {rejected.first.reason}" if rejected.first else ""
        raise DataError(f"{name}: no row of the query gives a document{first}")
    ctx.report.title = f"Documents of {name}"
    ctx.report.subtitle = (
        f"{writer.documents:,} documents, {writer.characters:,} characters; {rejected.count:,} rows rejected."
    )
    ctx.report.add_table("Query", ("setting", "value"), [("database", name), ("query", config.sql)])
    metrics = {"documents": writer.documents, "characters": writer.characters, "rejected": rejected.count}
    source = Dataset(
        ctx.out,
        about={
            "sources": [
                {
                    "name": name,
                    "licence": "not stated",
                    "what": f"a query{f' as of {config.as_of}' if config.as_of else ''}",
                }
            ]
        },
    )
    return finish_dataset(ctx, "data.query", [source], metrics=metrics, extra={"rejected": rejected.count})


def _create_engine(config: QueryConfig, database: Dataset | None) -> tuple[Engine, str]:
    """Return the engine and its public name: the file's name, or the URL with placeholders for secrets."""
    try:
        import sqlalchemy
    except ImportError:
        raise MissingDependency("data.query needs SQLAlchemy; install it with: pip install 'llmworks[sql]'") from None
    if (database is None) == (not config.url):
        raise UserError("data.query: give either the input `database` (a SQLite file) or the field `url`")
    if re.search(r"://[^/@]*:[^$@/][^@/]*@", config.url):  # checked here, since a config's own errors show its values
        raise UserError("url: contains a password; put it into an environment variable and write ${NAME}")
    if database is not None:
        if not database.path.is_file():
            raise DataError(f"{database.path}: is a directory, expected a SQLite file")
        with database.path.open("rb") as stream:
            if stream.read(16) != b"SQLite format 3\0":
                raise DataError(f"{database.path}: is not a SQLite file")
        url = sqlalchemy.URL.create(
            "sqlite", database=f"file:{database.path}", query={"mode": "ro", "immutable": "1", "uri": "true"}
        )
        return sqlalchemy.create_engine(url), database.name
    try:
        return sqlalchemy.create_engine(re.sub(r"\$\{(\w+)\}", _expand_secret, config.url)), config.url
    except sqlalchemy.exc.NoSuchModuleError:
        raise UserError(f"url: {config.url.partition(':')[0]!r} is not a dialect that SQLAlchemy supports") from None
    except sqlalchemy.exc.ArgumentError:
        raise UserError("url: invalid; write it as dialect://user:${NAME}@host/database") from None
    except ImportError as error:
        raise MissingDependency(
            f"{config.url.partition(':')[0]}: its driver is missing ({error}); install it with pip"
        ) from None


def _expand_secret(match: re.Match[str]) -> str:
    from urllib.parse import quote_plus

    value = os.environ.get(match[1])
    if value is None:
        raise UserError(f"url: the environment variable {match[1]} is not set")
    return quote_plus(value)


def _stream_rows(engine: Engine, name: str, config: QueryConfig) -> Iterator[Document | RejectedInput]:
    from sqlalchemy.exc import DBAPIError, ResourceClosedError

    from llmworks.data.readers.tables import TableFields, row_to_document

    fields = TableFields(config.text_field, config.id_field, config.max_document_mb << 20)
    try:
        with engine.connect().execution_options(stream_results=True) as connection:
            result: Any = connection.exec_driver_sql(config.sql).yield_per(FETCH_ROWS)
            for number, row in enumerate(result.mappings(), 1):
                yield row_to_document(row, name, number, fields)
    except DBAPIError as error:
        raise UserError(f"{name}: {str(error.orig).splitlines()[0]}") from None
    except ResourceClosedError:
        raise UserError(f"{name}: the statement returns no rows; data.query only reads") from None
