// Package leaktest fails the tests of a package that leave goroutines behind. It is no part of a running system.
package leaktest

import (
	"time"

	"go.uber.org/goleak"
)

// patience is how long goroutines may take to end after the last test. goleak's own is half a second, which is less than a busy machine
// may stand still.
const patience = time.Minute

// VerifyTestMain is goleak's, with more patience, and takes its options but Cleanup.
func VerifyTestMain(m goleak.TestingM, options ...goleak.Option) {
	goleak.VerifyTestMain(patient{m, options}, options...)
}

type patient struct {
	m       goleak.TestingM
	options []goleak.Option
}

// Run implements goleak.TestingM.
func (p patient) Run() int {
	code := p.m.Run()
	for end := time.Now().Add(patience); code == 0 && time.Now().Before(end) && goleak.Find(p.options...) != nil; {
	}
	return code
}
