"""The hospitals as the centre asks them: the site's node, and the federation inside one process."""
