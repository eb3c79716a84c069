package plan

import "testing"

// What the search spares: simulations for the best three of all mixtures of eight NPUs, and what brute force would take: as many for each topology
// as halving the range of rates does.
func BenchmarkBest(b *testing.B) {
	p := problem()
	p.Length, p.Least, p.Most = 60e9, 200, 1000
	p.Space.Families = Mixed("E", "P", "D", "EP", "PD", "EPD")
	var l *Planner
	for b.Loop() {
		l = planner(b, p)
		if _, err := l.Best(8, 3, -1); err != nil {
			b.Fatal(err)
		}
	}
	all := l.Topologies(8)
	some := all
	if len(some) > 40 { // every so many: brute force takes as long for the others
		some = nil
		for i := 0; i < len(all); i += len(all) / 40 {
			some = append(some, all[i])
		}
	}
	brute := planner(b, p)
	for _, t := range some {
		for _, c := range brute.p.Space.configs(t) {
			if _, err := Highest(0, Place(60), func(place int) (bool, error) {
				o, err := brute.p.play(c, Rate(place), brute.loads, true)
				brute.Runs += o.runs
				return o.attained, err
			}); err != nil {
				b.Fatal(err)
			}
		}
	}
	perSearch := b.Elapsed().Seconds() / float64(b.N)
	b.ReportMetric(float64(l.Runs)/perSearch, "simulations/s")
	b.ReportMetric(float64(l.Runs), "simulations")
	b.ReportMetric(float64(len(all)), "topologies")
	b.ReportMetric(float64(l.Tried), "simulated")
	b.ReportMetric(float64(brute.Runs)/float64(len(some))*float64(len(all))/float64(l.Runs), "brute/search")
}

// BenchmarkBound is a topology's.
func BenchmarkBound(b *testing.B) {
	l := planner(b, problem())
	all := l.Topologies(8)
	for i := 0; b.Loop(); i++ {
		l.Bound(all[i%len(all)])
	}
}

// BenchmarkNew is the work that is done once.
func BenchmarkNew(b *testing.B) {
	p := problem()
	p.Seeds, p.Least, p.Most = []uint64{1, 2, 3}, 200, 2000
	for b.Loop() {
		planner(b, p)
	}
}
