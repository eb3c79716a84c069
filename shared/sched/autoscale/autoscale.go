package autoscale

// State is what is remembered from one View to the next.
type State struct {
	policy Policy
}

// New returns a State that has seen nothing.
func New(p Policy) *State { return &State{policy: p} }

// SetPolicy changes the policy. What was seen stays.
func (s *State) SetPolicy(p Policy) { s.policy = p }

// Decide says what is to be done now. It is to be called about once a second, with each View once; a Decision that changes
// something is taken to be carried out, or advised, from then on, and what becomes of it later Views tell.
func (s *State) Decide(v *View) Decision {
	return Decision{Now: v.Now, Change: Change{Action: None}, Why: "nothing was seen yet"}
}
