"""The ground floor: errors, files, schemas, figures, and the machine."""
