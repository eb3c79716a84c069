package scaler

import (
	"bytes"
	"cmp"
	"fmt"
	"os"

	"trireme.dev/shared/sched/autoscale"
)

// policyFile is the file that the policy comes from. It is read again and again, which finds every way of changing it: written over,
// renamed into place, or a link that points elsewhere, as on Kubernetes.
type policyFile struct {
	name string         // "": there is none, the policy is the default
	mode autoscale.Mode // stands above the file's; "": it does not
	seen []byte
	bad  string // why it could not be used when it was read last
}

// load reads the file. Changed is false when it is as it was when it was read last, the same error included.
func (f *policyFile) load() (p autoscale.Policy, changed bool, err error) {
	var data []byte
	if f.name != "" {
		if data, err = os.ReadFile(f.name); err != nil {
			err = fmt.Errorf("reading the policy: %w", err)
		}
	}
	if err == nil {
		if f.seen != nil && f.bad == "" && bytes.Equal(data, f.seen) {
			return p, false, nil
		}
		p, err = autoscale.Parse(data)
	}
	if err != nil {
		if f.name != "" {
			err = fmt.Errorf("%s: %w", f.name, err)
		}
		changed = f.bad != err.Error()
		f.bad = err.Error()
		return p, changed, err
	}
	// What is as it was before it was spoilt comes back into force, which is news.
	f.seen, f.bad = append([]byte{}, data...), ""
	p.Mode = cmp.Or(f.mode, p.Mode)
	return p, true, nil
}
