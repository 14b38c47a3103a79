"""Every knob of the system: frozen pydantic sections, presets, and errors that say what to do."""
