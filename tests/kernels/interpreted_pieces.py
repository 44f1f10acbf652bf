"""What `pallas_kernels.quantize` does with shared memory in PTX, for the interpreter: arrays instead of each thread's registers."""

import threading

import jax.numpy as jnp
import numpy as np

ROWS, PIECES, COLUMNS = 32, 4, 128


def rows_of_pieces(x):
    """[128, 32], line 32 w + r being piece w of row r, as [32, 128]."""
    return x.reshape(PIECES, ROWS, -1).transpose(1, 0, 2).reshape(ROWS, -1)


def pieces_of_rows(x):
    """And back."""
    return x.reshape(ROWS, PIECES, -1).transpose(1, 0, 2).reshape(PIECES * ROWS, -1)


def other_name(x):
    """A number for each of 32 rows, or for each of their 128 pieces, as the other."""
    return x[:ROWS] if x.size == COLUMNS else jnp.tile(x, PIECES)


# Of a tile in shared memory, which can be read, and written, as a whole or some of its columns.


def pieces_loaded(tile):
    return [pieces_of_rows(tile.read())]


def pieces_stored(tile, x):
    tile.write(rows_of_pieces(x))
    return []


def pieces_turned(tile, x):
    pieces_stored(tile, x)
    return [tile.read().T]


def columns_stored(tile, x, number):
    tile.write(x, slice(int(number) * x.shape[1], (int(number) + 1) * x.shape[1]))
    return []


def tile_turned(tile):
    return [tile.read().T]


def turned_stored(tile, x, first):
    tile.write(x, slice(16 * first, 16 * first + x.shape[1]))
    return []


def rows_gathered(tile, values, tokens, j):
    """Something else, until `rows_are_there`."""
    rows, _ = values.content()
    there = tokens < len(rows)
    block = rows[np.where(there, tokens, 0), COLUMNS * int(j) : COLUMNS * (int(j) + 1)]
    tile.write(np.ones_like(block))
    _coming.setdefault(tile.owner, []).append((tile, np.where(there[:, None], block, np.zeros((), block.dtype))))
    return []


_coming = {}  # tiles and their rows, of each thread


def rows_are_there(owner):
    for tile, rows in _coming.pop(owner, []):
        tile.write(rows)


_taking = threading.Lock()


def ticket_taken(tile):
    """No race: it is one instruction."""
    with _taking:
        number, _ = tile.content()
        tile.put(number + 1)
    return [np.int32(number[0])]


def ticket_published(tile, ticket):
    tile.write(ticket.reshape(1))
    return []


IN_MEMORY = {
    f.__name__: f
    for f in (
        pieces_loaded,
        pieces_stored,
        pieces_turned,
        columns_stored,
        tile_turned,
        turned_stored,
        rows_gathered,
        ticket_taken,
        ticket_published,
    )
}
