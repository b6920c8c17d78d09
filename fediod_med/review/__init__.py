"""Everything below the review app: folders to read, pictures to show, ratings to keep; no web framework in sight."""
