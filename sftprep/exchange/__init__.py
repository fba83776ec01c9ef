"""Exchange of data and settings with other tools: exports of builds, imports of settings."""
