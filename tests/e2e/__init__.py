"""Real applications behind a real forward, used in a real browser."""
