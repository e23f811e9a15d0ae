"""The ground floor: errors and progress, files, the folder of a run, several processes, reports. Imports nothing of ours outside kit/."""
