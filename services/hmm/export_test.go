package hmm

import "time"

// Age has a daemon that does not serve yet have begun earlier.
func (d *Daemon) Age(by time.Duration) { d.began = d.began.Add(-by) }
