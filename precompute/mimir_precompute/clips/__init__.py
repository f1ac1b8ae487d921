"""The user's clips: listed, keyed, fetched, and opened safely. Nothing is decoded here."""
