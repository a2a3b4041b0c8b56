"""How the tables came to be what they are, step by step; `kohakuriver.store.schema` goes through them."""
